"""Fusing the models of other libraries: ``fuse``, ``restore``, ``report``, ``freeze_bn``, ``unfreeze_bn``."""

from fastres.fusion.freezing import freeze_bn, unfreeze_bn
from fastres.fusion.reporting import Report, Row, report
from fastres.fusion.swap import fuse, restore

__all__ = ["Report", "Row", "freeze_bn", "fuse", "report", "restore", "unfreeze_bn"]
