/// Rows of the table for ids (1, length), and pictures' features in the places of their placeholders, in reading order:
/// (1, length, hidden). For runtimes whose `embed` looks ids up and knows no pictures.
///
/// A placeholder beyond the features is the model's own word, where its table has it. `lookup` writes the rows of ids
/// that the table has.
func embedWithImages(
    _ ids: [Int], _ features: Tensor?, _ model: ModelCard, lookup: ([Int], Values<Float>) throws -> Void
) throws -> Tensor {
    let isBeyond = model.imageTokenId >= model.vocabSize
    let all = try Tensor(.float32, [1, ids.count, model.hiddenSize])
    try lookup(ids.map { isBeyond && $0 == model.imageTokenId ? 0 : $0 }, all.floats)
    guard let features = try features?.toFloats(), features.count > 0 else { return all }
    let (places, width) = (ids.indices.filter { ids[$0] == model.imageTokenId }, model.hiddenSize)
    for (row, place) in places.prefix(features.shape[0]).enumerated() {
        _ = all.floats.write(features.floats[row * width..<(row + 1) * width], from: place * width)
    }
    return all
}

/// Features (tokens, hidden) of pictures uint8 (pictures, 3, height, width), looked at one by one, below each other.
func lookOneByOne(_ pixels: Tensor?, _ place: String, look: (Tensor) throws -> Tensor) throws -> Tensor {
    guard let pixels, pixels.shape[0] > 0 else { throw MobileMMError("\(place): no picture to look at") }
    let rows = try (0..<pixels.shape[0]).map { try look(try pixels.slice(axis: 0, $0..<$0 + 1)).toFloats() }
    let width = rows[0].shape.last!
    let all = try Tensor(.float32, [rows.reduce(0) { $0 + $1.count / width }, width])
    var at = 0
    for tensor in rows { at = all.floats.write(tensor.floats, from: at) }
    return all
}

/// Positions (3, 1, count) of text alone, where positions have three dimensions.
func textPositions(_ range: Range<Int>) throws -> Tensor {
    let found = try Tensor(.int64, [3, 1, range.count])
    _ = found.values(Int64.self).write((0..<3).flatMap { _ in range.map(Int64.init) })
    return found
}

extension Tensor {
    /// Of int64 or int32.
    func wholeNumbers() throws -> [Int] {
        switch dtype {
        case .int64: return values(Int64.self).map(Int.init)
        case .int32: return values(Int32.self).map(Int.init)
        default: throw MobileMMError("ids of \(dtype.rawValue)")
        }
    }
}
