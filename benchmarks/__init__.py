"""How fast this repository trains, against the machine's limit and the alternatives."""
