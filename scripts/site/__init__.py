"""What `make site` adds to MkDocs: a page of the README, links out of docs/, docstrings as this project writes them."""
