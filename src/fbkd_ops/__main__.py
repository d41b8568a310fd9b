"""``python -m fbkd_ops`` prints the report of :mod:`fbkd_ops.info`: version, build, backends, documentation."""

from .info import report

print(report())
