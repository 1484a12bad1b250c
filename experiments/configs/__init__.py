"""Where configuration files of the experiments stood: `--config` still finds them."""
