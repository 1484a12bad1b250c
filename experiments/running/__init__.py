"""What every command and run has: flags, a folder, metrics, tables and figures."""
