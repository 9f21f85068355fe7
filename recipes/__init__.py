"""Ready-made LightningModules and LightningDataModules, used by the configs and the command line."""
