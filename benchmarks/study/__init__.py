"""Does distillation make the student better? Paired trainings on small data: ``python -m benchmarks.study --help``."""
