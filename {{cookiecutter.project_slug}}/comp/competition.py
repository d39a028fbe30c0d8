"""YOURS: what a config cannot say. Define a function here by one of these names and it is in force; `comp check` lists them.

    read_samples(raw)                     -> DataFrame, instead of the tables that competition.yaml declares
    load_image(row, decode)               -> uint8 array (height, width, channels) for one image of the samples table
                                             row["image"] is its path there, row["file"] the file; decode(row["image"]) gives
                                             it as usual, decode(row["image"], full=True) at full size; row["x"] is the text
                                             of a column of the table that competition.yaml declares: image_columns: [x],
                                             or image_columns: all for the whole row but its targets
    model(cfg, outputs)                   -> torch.nn.Module, instead of the timm model of the config
    loss(output, target)                  -> tensor, one number a sample (batch,)
    metric(truth, prediction, rows)       -> number; set metric.direction = "max" or "min",
                                             metric.needs = "probability", "label" or "value"
    recipe(size)                          -> comp.transforms.Recipe, for `augment.recipe: recipe`
    postprocess(rows, prediction)         -> prediction, before it is written into a submission
    write_submission(rows, prediction, sample) -> DataFrame, instead of the forms that competition.yaml knows

A row that is a part of its file, a box or a page, says which in columns of the table. Two rows of one file are two images,
each with its own entry in the cache. With `image_columns: [x, y, w, h]` in configs/competition.yaml:

    def load_image(row, decode):
        whole = decode(row["image"], full=True)
        x, y, w, h = (int(float(row[name])) for name in ("x", "y", "w", "h"))
        return whole[y : y + h, x : x + w]      # brought to data.size by data.resize afterwards

In what read_samples gives, `images` holds a path, or a list of them; "red/1.png//green/1.png" are files that are channels of one.

It may import comp.engine.config.resolve, comp.engine.tasks.kinds and comp.metrics, nothing above them. A template update never touches this file.
"""
