"""The machine: devices, files, checkpoints, signals and the screen."""
