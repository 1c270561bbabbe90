package org.mobilemm

/** One thing said: pictures, which stand in front, and a text. */
data class Message(val role: String, val text: String, val images: Int = 0)

/**
 * The conversation as text, cut where pictures stand: one piece more than there are pictures.
 *
 * `begin`, or with a system message `system`; then each turn; then `generation`, which asks for the answer. A user's
 * pictures are each written `image_prefix`, placeholders, `image_suffix`. `strip` takes the white space off both ends
 * of each message's text, or off its whole content.
 *
 * Raises [MobileMMError] for a system message where the model takes none, and for a role that is unknown or out of
 * place.
 */
fun render(
    prompt: Prompt,
    messages: List<Message>,
    addGenerationPrompt: Boolean = true,
): List<String> {
    var before: String? = null
    var pieces = mutableListOf(prompt.begin)
    for ((index, message) in messages.withIndex()) {
        val role = message.role
        if (role !in setOf("system", "user", "assistant")) {
            throw MobileMMError("message $index: unknown role ${shown(role)}; known: system, user, assistant")
        }
        if (message.images > 0 && role != "user") {
            throw MobileMMError("message $index: an image can only stand in a user's message")
        }
        if (role == "system" && index > 0) throw MobileMMError("message $index: a system message can only stand first")
        if (role == "system") {
            if (prompt.system == null) throw MobileMMError("this model's template takes no system prompt")
            pieces = mutableListOf("")
        }
        val turn = turn(prompt, role, before)
        before = role
        val prefix = if (message.images > 0) turn.prefixBeforeImage ?: turn.prefix else turn.prefix
        val content = content(prompt, message.images, if (turn.text) message.text else "")
        pieces[pieces.lastIndex] += prefix + content.first()
        pieces += content.drop(1)
        pieces[pieces.lastIndex] += turn.suffix
    }
    if (addGenerationPrompt) pieces[pieces.lastIndex] += prompt.generation
    return pieces
}

private fun turn(
    prompt: Prompt,
    role: String,
    before: String?,
): Turn =
    when {
        role == "system" && prompt.system != null -> prompt.system
        role == "assistant" -> prompt.assistant
        before == "assistant" -> prompt.laterUser ?: prompt.user
        before == "system" -> prompt.userAfterSystem ?: prompt.user
        else -> prompt.user
    }

private fun content(
    prompt: Prompt,
    images: Int,
    given: String,
): List<String> {
    val text = if (prompt.strip == "text") given.trim(::isPythonSpace) else given
    if (images == 0) return listOf(if (prompt.strip == "content") text.trim(::isPythonSpace) else text)
    val between = prompt.imageSuffix + prompt.imagePrefix
    val pieces = mutableListOf(prompt.imagePrefix)
    repeat(images - 1) { pieces += between }
    pieces += prompt.imageSuffix + text
    if (prompt.strip == "content") {
        pieces[0] = pieces.first().trimStart(::isPythonSpace)
        pieces[pieces.lastIndex] = pieces.last().trimEnd(::isPythonSpace)
    }
    return pieces
}

/** What Python's `str.strip` takes off, which wrote the templates: four separators more than a tokenizer's space. */
private fun isPythonSpace(char: Char) = char in '\u001c'..'\u001f' || CharacterClasses.isSpace(char.code)

/** A bundle's tokenizer, for conversations with pictures. */
class PromptTokenizer(
    private val tokenizer: Tokenizer,
    private val prompt: Prompt,
    private val imageTokenId: Int,
    private val numImageTokens: Int,
) {
    private val plain by lazy { tokenizer.without(imageTokenId) }

    /** One more than the largest id that stands for something: no answer may hold others. */
    val size = tokenizer.size

    /** The ids of a conversation, each picture as its placeholders. Raises [MobileMMError] as [render] does. */
    fun encode(
        messages: List<Message>,
        addGenerationPrompt: Boolean = true,
    ): List<Int> {
        val ids = ArrayList<Int>()
        for ((index, piece) in render(prompt, messages, addGenerationPrompt).withIndex()) {
            if (index > 0) repeat(numImageTokens) { ids += imageTokenId }
            val special = prompt.addBos && index == 0
            if (piece.isNotEmpty() || special) ids += encode(piece, special)
        }
        return ids
    }

    /** The text of ids, `special` tokens left out or not. */
    fun decode(
        ids: List<Int>,
        special: Boolean = false,
    ) = tokenizer.decode(ids, special)

    private fun encode(
        text: String,
        special: Boolean,
    ): List<Int> {
        val ids = tokenizer.encode(text, special)
        // Somebody's words may hold the placeholder itself: they are text, and no picture.
        return if (imageTokenId in ids) plain.encode(text, special) else ids
    }
}
