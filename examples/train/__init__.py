"""Train a teacher, a baseline or a distilled student on your own data, with torchvision's detectors."""
