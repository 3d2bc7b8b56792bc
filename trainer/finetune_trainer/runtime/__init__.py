"""The process: device, precision, process group, random state, signals."""
