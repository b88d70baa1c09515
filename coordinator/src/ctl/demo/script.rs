//! What is said in the demo.

/// The system prompt that all turns share: long enough to be worth caching.
pub const SYSTEM: &str = "You are the guide of Millrace. Answer in two or three short, plain sentences, using only the facts below.

Facts about Millrace:
Millrace is a cluster that serves large language models. It is written in Rust. It is named after a millrace, the channel that \
carries water to the wheel of a mill.
Millrace has three kinds of processes: prefill nodes, decode nodes and coordinators.
A prefill node reads the whole prompt once. This work needs much computing power, so prefill nodes are good at arithmetic.
A decode node writes the answer, one token after the other. This work needs much memory bandwidth, so decode nodes are good at \
moving memory.
The KV cache is what a model remembers of the text it has read. A prefill node makes the KV cache and sends it to a decode node, \
layer by layer, while later layers are still being computed. So most of the time of the transfer is hidden.
Every piece of the KV cache is checked before it is used. A piece that is wrong is never decoded; it is sent again or computed again.
The KV cache is kept in blocks of sixteen tokens. When a new prompt begins with text that was read before, the blocks of that text \
are used again and need not be computed. So the second question of a conversation is answered sooner than the first.
A coordinator knows where every block is. There are three coordinators, and they agree with each other through the Raft protocol. \
One of them is the leader. When the leader dies, the others choose a new leader, and no answer is lost.
All processes talk to each other over QUIC, encrypted, and each proves with a certificate who it is.
A prompt goes to the node that has most of it in its cache, unless that node is too busy.
When a node dies in the middle of an answer, another node goes on with the same answer.";

/// The user's side of the conversation.
pub const QUESTIONS: [&str; 3] = [
    "What is Millrace, and which kinds of processes does it have?",
    "What does a prefill node do, and what does a decode node do?",
    "What happens when the leader of the coordinators dies?",
];

/// The question whose answer is disturbed.
pub const LONG_QUESTION: &str = "Tell me a story about a miller, his daughter and the river that turns the wheel of their mill.";
