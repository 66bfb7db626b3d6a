"""The trace page, pictures of the masks, the bench and the course. Nothing in the core imports anything from here."""
