// The chat template in an engine's header, which C programs do not use: read so far as to refuse what Python refuses.
#pragma once

#include "json.h"

namespace goslet {

// Throws ContainerError or JsonError where ChatTemplate.from_json of runtime/chat.py raises.
void check_chat_template(const Json& chat);

}  // namespace goslet
