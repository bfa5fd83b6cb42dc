"""Commands of `deadpool` that speak to a running job or to its files."""
