"""Which response tokens of a teacher belong to which of a student."""
