"""What a person sees: tables on the terminal and the model card, made from result objects."""
