"""The FineTuneJob operator. Importing it never imports torch."""
