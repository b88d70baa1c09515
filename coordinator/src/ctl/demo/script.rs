//! What is said in the demo. The model is small: it answers well what the page before it answers.

/// The system prompt that all turns share: long enough to be worth caching.
pub const SYSTEM: &str = "You are the friendly guide of Millrace. You answer questions with the help of this page.

What is Millrace?
Millrace is a program that lets many computers serve one large language model together. It is written in Rust. It is named after the channel that carries water to the wheel of a mill.

What is prefill?
Prefill is the first half of the work. A prefill node reads the whole question at once. Reading needs much arithmetic, so prefill nodes like fast processors.

What is decode?
Decode is the second half of the work. A decode node writes the answer, one word after the other. Writing needs much memory, so decode nodes like fast memory.

What is the KV cache?
The KV cache is what the model remembers of the text that it has read. A prefill node sends it to a decode node, layer by layer, while it is still reading. So the journey costs almost no time.

Can the KV cache be damaged on its way?
It can, but a damaged piece is never used. Every piece carries a checksum. A decode node checks each piece before it writes a single word, and a bad piece is sent again.

Why is the second question answered faster than the first?
Because the text of the first question is still in the cache. Only the new words must be read. The cache is kept in blocks of sixteen tokens, and a new question goes to the node that holds most of its blocks.

What does the coordinator do?
The coordinator remembers which node holds which block, and sends every question to the best node. There are three coordinators, so that one may die. They agree with each other by a method called Raft.

What happens when the leader dies?
When the leader dies, the other two coordinators choose a new leader within a few seconds. No answer is lost. The words keep coming as if nothing had happened.

Is Millrace safe?
Yes. All messages are encrypted, and every computer proves with a certificate who it is.";

/// The user's side of the conversation.
pub const QUESTIONS: [&str; 3] = ["What is decode?", "What happens when the leader dies?", "What is Millrace?"];

/// The question whose answer is disturbed.
pub const LONG_QUESTION: &str = "Write a short story about a miller's daughter who saves the mill in a storm.";

/// The first paragraph of an answer, so far: a small model does not know when to stop.
#[must_use]
pub fn first_paragraph(text: &str) -> &str {
    let text = text.trim_start();
    // Without its last space: what was a paragraph stays the beginning of one when more comes.
    text.split("\n\n").next().unwrap_or(text).trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paragraph_ends_at_an_empty_line() {
        assert_eq!(first_paragraph("\n\none\ntwo\n\nthree"), "one\ntwo");
        assert_eq!(first_paragraph("one"), "one");
        let text = "\n\none \ntwo\n\nthree";
        for cut in 1..text.len() {
            assert!(first_paragraph(text).starts_with(first_paragraph(&text[..cut])), "cut at {cut}");
        }
    }
}
