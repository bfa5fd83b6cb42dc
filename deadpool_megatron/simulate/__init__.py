"""`deadpool simulate`: goodput of large jobs under failures."""
