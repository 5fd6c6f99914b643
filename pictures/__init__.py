"""Pictures of one's own: reading them, converting them to 28x28, and making a data set of them."""
