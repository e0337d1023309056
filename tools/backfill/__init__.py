"""Embeds a corpus and puts the vectors where retrieval reads them; safe to kill and to start again."""
