"""The non-local block and the relation term, without a matrix of all pairs of pixels."""
