"""Why batch normalisation helps: measurements that the papers argue with."""
