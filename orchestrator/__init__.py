"""The user's door: the command line, and the Ray cluster on which a run's workers live. Nothing else imports ray."""
