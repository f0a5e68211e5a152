"""How a network bears what it was not trained on: corruptions, perturbations, other test sets, attacks, and what to say of them."""
