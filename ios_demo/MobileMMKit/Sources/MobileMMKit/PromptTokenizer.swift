/// One thing said: pictures, which stand in front, and a text.
public struct Message: Sendable {
    public let role: String
    public let text: String
    public let images: Int

    public init(role: String, text: String, images: Int = 0) {
        (self.role, self.text, self.images) = (role, text, images)
    }
}

/// The conversation as text, cut where pictures stand: one piece more than there are pictures.
///
/// `begin`, or with a system message `system`; then each turn; then `generation`, which asks for the answer. A user's
/// pictures are each written `image_prefix`, placeholders, `image_suffix`. `strip` takes the white space off both ends
/// of each message's text, or off its whole content.
///
/// Throws ``MobileMMError`` for a system message where the model takes none, and for a role that is unknown or out of
/// place.
public func render(_ prompt: Prompt, _ messages: [Message], addGenerationPrompt: Bool = true) throws -> [String] {
    var before: String?
    var pieces = [prompt.begin]
    for (index, message) in messages.enumerated() {
        let role = message.role
        if !["system", "user", "assistant"].contains(role) {
            throw MobileMMError("message \(index): unknown role \(shown(role)); known: system, user, assistant")
        }
        if message.images > 0 && role != "user" {
            throw MobileMMError("message \(index): an image can only stand in a user's message")
        }
        if role == "system" && index > 0 { throw MobileMMError("message \(index): a system message can only stand first") }
        if role == "system" {
            if prompt.system == nil { throw MobileMMError("this model's template takes no system prompt") }
            pieces = [""]
        }
        let turn = turn(prompt, role, before)
        before = role
        let prefix = message.images > 0 ? turn.prefixBeforeImage ?? turn.prefix : turn.prefix
        let content = content(prompt, message.images, turn.text ? message.text : "")
        pieces[pieces.count - 1] += prefix + content[0]
        pieces += content.dropFirst()
        pieces[pieces.count - 1] += turn.suffix
    }
    if addGenerationPrompt { pieces[pieces.count - 1] += prompt.generation }
    return pieces
}

private func turn(_ prompt: Prompt, _ role: String, _ before: String?) -> Turn {
    if role == "system", let system = prompt.system { return system }
    if role == "assistant" { return prompt.assistant }
    switch before {
    case "assistant": return prompt.laterUser ?? prompt.user
    case "system": return prompt.userAfterSystem ?? prompt.user
    default: return prompt.user
    }
}

private func content(_ prompt: Prompt, _ images: Int, _ given: String) -> [String] {
    let text = prompt.strip == "text" ? stripped(given) : given
    if images == 0 { return [prompt.strip == "content" ? stripped(text) : text] }
    let between = prompt.imageSuffix + prompt.imagePrefix
    var pieces = [prompt.imagePrefix] + Array(repeating: between, count: images - 1) + [prompt.imageSuffix + text]
    if prompt.strip == "content" {
        pieces[0] = stripped(pieces[0], end: false)
        pieces[images] = stripped(pieces[images], start: false)
    }
    return pieces
}

/// What Python's `str.strip` takes off, which wrote the templates: four separators more than a tokenizer's space.
private func stripped(_ text: String, start: Bool = true, end: Bool = true) -> String {
    func isSpace(_ scalar: Unicode.Scalar) -> Bool {
        ("\u{1C}"..."\u{1F}").contains(scalar) || CharacterClasses.isSpace(scalar)
    }
    var left = text.scalars[...]
    if start { left = left.drop(while: isSpace) }
    while end, let last = left.last, isSpace(last) { left.removeLast() }
    return String(left)
}

/// A bundle's tokenizer, for conversations with pictures.
public final class PromptTokenizer {
    private let tokenizer: Tokenizer
    // The same file reads the same way again.
    private lazy var plain = (try? tokenizer.without(imageTokenId)) ?? tokenizer
    private let prompt: Prompt
    private let imageTokenId: Int
    private let numImageTokens: Int

    /// One more than the largest id that stands for something: no answer may hold others.
    public var size: Int { tokenizer.size }

    public init(_ tokenizer: Tokenizer, _ prompt: Prompt, imageTokenId: Int, numImageTokens: Int) {
        (self.tokenizer, self.prompt) = (tokenizer, prompt)
        (self.imageTokenId, self.numImageTokens) = (imageTokenId, numImageTokens)
    }

    /// The ids of a conversation, each picture as its placeholders. Throws ``MobileMMError`` as
    /// ``render(_:_:addGenerationPrompt:)`` does.
    public func encode(_ messages: [Message], addGenerationPrompt: Bool = true) throws -> [Int] {
        var ids: [Int] = []
        for (index, piece) in try render(prompt, messages, addGenerationPrompt: addGenerationPrompt).enumerated() {
            if index > 0 { ids += Array(repeating: imageTokenId, count: numImageTokens) }
            let special = prompt.addBos && index == 0
            if !piece.isEmpty || special { ids += encode(piece, special: special) }
        }
        return ids
    }

    /// The text of ids, without special tokens.
    public func decode(_ ids: [Int]) -> String { tokenizer.decode(ids) }

    func decoded(_ ids: [Int], special: Bool = false) -> Scalars { tokenizer.decoded(ids, special: special) }

    private func encode(_ text: String, special: Bool) -> [Int] {
        let ids = tokenizer.encode(text, special: special)
        // Somebody's words may hold the placeholder itself: they are text, and no picture.
        return ids.contains(imageTokenId) ? plain.encode(text, special: special) : ids
    }
}
