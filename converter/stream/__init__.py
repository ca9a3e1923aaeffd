"""Weights on their way: read, quantised and handed out piece by piece, in bounded memory."""
