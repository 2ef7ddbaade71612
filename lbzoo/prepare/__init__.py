"""Raw corpora into the formats that ``lbzoo.data`` reads."""
