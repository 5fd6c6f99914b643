"""What the scripts show of a trained model: its mistakes, its reports and figures, its answers."""
