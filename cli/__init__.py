"""What a person types: `noisy-student up`, `demo`, `runs start`, `watch`, `promote`, `predict`, `doctor` and more."""
