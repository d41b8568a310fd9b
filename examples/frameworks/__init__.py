"""The distiller in detection frameworks: one file each, to copy from."""
