"""Small faults, put into a copy of the sources one at a time, each of which the tests of its op must notice."""
