"""What runs train on: text, tokens and examples."""
