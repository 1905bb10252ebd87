"""Rooms: one per hosted session; they commit changes and broadcast them."""
