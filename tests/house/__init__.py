"""The house around the rooms: images, documents, locks."""
