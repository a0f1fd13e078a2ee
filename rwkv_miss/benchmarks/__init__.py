"""What is measured beside other programs, or against a limit. Nothing but the command `bench` imports this."""
