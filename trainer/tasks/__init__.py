"""Downstream tasks on a decoder, alone or in its engine, by one rank or many: scores, answers, files of questions."""
