"""Files in, batches out.

    decode.py            one image: bytes -> RGB, with limits; containers/ takes the files apart first
    preprocess.py        an image -> the network's input; the one object that travels with the weights
    labels.py            classes, targets, stratified splits, names fit for print
    split.py             samples with keys and targets; the DataSource that deals them to train, val and test
    sources.py           open_source: what a person writes -> a DataSource
    folder.py, table.py, builtin.py, torchvision_sets.py    the kinds of source there are
    tar_shards.py, parquet.py    many samples a file; shards.py what both have in common, tar_index.py what is where
    composites.py        the open stand-in for JFT
    importance.py        what each class weighs in MAP@100
    blacklist.py         the validation images of ImageNet that the paper leaves out
    relabel.py           the same samples with a model's class numbers
    check.py             every image decoded once, the bad ones named and left out
    augment.py           random changes to training images
    sampling.py          order and randomness as pure functions of (seed, epoch, index)
    loader.py            batches; workers.py the processes that make them

Only loader.py imports torch; all else looks at data without it.
"""
