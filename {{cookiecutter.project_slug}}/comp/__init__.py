"""From raw files to a submitted, honestly ensembled prediction. Start reading at cli.py or train/loop.py."""
