"""The trace page, the animation, pictures of masks, the bench and the course. The core imports nothing from here."""
