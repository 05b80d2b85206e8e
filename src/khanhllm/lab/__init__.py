"""A trained model examined, and this machine measured."""
