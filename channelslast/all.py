"Everything a notebook needs: `from channelslast.all import *`, after `from fastai.vision.all import *`."

from channelslast.callback import *
from channelslast.find import *
from channelslast.memory_format import *
from channelslast.precision import *
from channelslast.summary import *
