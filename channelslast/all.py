"Everything a notebook needs: `from channelslast.all import *`."

from channelslast import *
