# One library of C that handles messages for one page: LIBRARY, out of SOURCES and lone_page.c beside this file.
MESSAGES := $(dir $(lastword $(MAKEFILE_LIST)))
CFLAGS   ?= -O2 -g
CFLAGS   += -std=gnu11 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes

all: $(LIBRARY)

$(LIBRARY): $(SOURCES) $(MESSAGES)lone_page.c $(MESSAGES)lone_page.h $(MESSAGES)library.mk Makefile
	@if echo '#include <xxhash.h>' | $(CC) -E -x c - >/dev/null 2>&1; then \
	    mkdir -p $(dir $@) && echo "==> $(notdir $@)" && \
	    $(CC) $(CFLAGS) -shared -o $@ $(SOURCES) $(MESSAGES)lone_page.c -Wl,-z,now,-z,relro; \
	else echo "==> no $(notdir $@): xxhash.h is missing (apt-get install libxxhash-dev); faults take longer"; fi

clean:
	@rm -f $(LIBRARY)

.PHONY: all clean
