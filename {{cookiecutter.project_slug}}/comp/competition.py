"""YOURS: functions for what configs/competition.yaml cannot express. A template update never changes it.

Define a function in this file under one of the names below and it replaces the built-in one. `comp check`
lists what is defined. Name and number of arguments must be as here.

read_samples(raw) -> pandas.DataFrame
    The rows, instead of the tables declared in competition.yaml. `raw` is the Path of the raw folder. One
    row per sample, with the columns that competition.yaml names (id, target, group, time, metadata) and
        images   path of an image below `raw`, or a list of paths. "red/1.png//green/1.png" is one image
                 whose channels are in two files
        source   "train", "test" or "extra" (trained on, never scored)
        weight   optional: weight of the sample in the loss (default: 1)
        row      optional: its key in the submission (default: the id)

load_image(row, decode) -> numpy.ndarray of uint8, (height, width, channels)
    One image; it is resized to data.size afterwards, by data.resize. `row` is a dict:
        row["image"]   the path, as in `images`
        row["file"]    the file on disk
        row[column]    text of a column listed under `image_columns` in competition.yaml
                       (`image_columns: all`: every column except targets and weight)
    decode(row["image"]) is what would be used without this function, decode(row["image"], full=True) the
    image at full size. The values of the row are part of the cache key: two boxes in one file are two images.
    To crop a box, with `image_columns: [x, y, w, h]`:

        def load_image(row, decode):
            image = decode(row["image"], full=True)
            x, y, w, h = (int(float(row[name])) for name in ("x", "y", "w", "h"))
            return image[y : y + h, x : x + w]

model(cfg, outputs) -> torch.nn.Module
    The network, instead of the timm model `model.name`: (batch, channels, height, width) -> (batch, outputs).

        def model(cfg, outputs):
            return timm.create_model("resnet18", in_chans=cfg.data.channels, num_classes=outputs)

loss(output, target) -> torch.Tensor, (batch,)
    One unreduced loss a sample, for `loss.name: loss`. `output` is (batch, outputs).

        def loss(output, target):
            return F.cross_entropy(output, target, reduction="none")

metric(truth, prediction, rows) -> float
    For `metric: metric` in competition.yaml. `rows` are the scored rows of data/samples.parquet. Two
    attributes are required: metric.direction = "max" or "min", and metric.needs = "probability", "label",
    "ranking" or "value", which is what `prediction` holds.

        def metric(truth, prediction, rows):
            return float((truth == prediction).mean())

        metric.direction, metric.needs = "max", "label"

recipe(size) -> comp.transforms.Recipe
    The augmentation, for `augment.recipe: recipe`. `size` is the side of the input in px. Ops that move
    pixels come first, and leave a square of `size`; then those that change values.

        def recipe(size):
            from comp.transforms import Recipe

            return Recipe([A.RandomCrop(size, size), A.HorizontalFlip()], [A.ColorJitter(p=0.5)])

postprocess(rows, prediction) -> prediction
    Called before a submission is written. `rows` are the test rows, `prediction` is an array (rows, outputs),
    or a dict of arrays by target if there are several. The result has the same shape.

write_submission(rows, prediction, sample) -> pandas.DataFrame
    The submission, instead of `submission.form`. `sample` is the host's sample submission as a DataFrame of
    text. The result is validated like any other submission.

At the top, this file may import comp.engine.config.resolve, comp.engine.tasks.kinds and comp.metrics. Other
modules of comp import this one, so import them inside the function, as in the example of `recipe`.
"""
