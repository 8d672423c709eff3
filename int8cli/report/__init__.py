"""What a person sees: tables on the terminal, pages, charts and the model card, made from result objects."""
