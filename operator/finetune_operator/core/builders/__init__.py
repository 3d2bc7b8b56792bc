"""Build the objects of an attempt: Job, pod template, torchrun Service."""
