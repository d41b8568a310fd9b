"""Bridges to other frameworks, one module a framework; none of them is imported by the package itself."""
