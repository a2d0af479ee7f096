"""What only a GPU can tell, in one command of limited time for a machine that is lent for minutes: ``make gpu``."""
