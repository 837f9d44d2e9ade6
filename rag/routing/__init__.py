"""Which way a question is answered, and why."""
