import Foundation

#if canImport(ImageIO)
    import CoreGraphics
    import ImageIO
#else
    import CPng
    import CTurboJpeg
#endif

/// Pictures from files, upright: PNG and JPEG everywhere, on Apple's systems also what else ImageIO reads.
public enum PictureFile {
    /// Throws ``MobileMMError`` naming the file for what is no picture, or too large a one.
    public static func read(_ file: URL) throws -> PixelRaster {
        guard let data = try? Data(contentsOf: file) else {
            throw MobileMMError("\(file.path): cannot be read; give a picture's file")
        }
        do {
            return try decode(data)
        } catch let error as MobileMMError {
            throw MobileMMError("\(file.path): \(error.message)")
        }
    }

    fileprivate static func checkSize(_ width: Int, _ height: Int) throws {
        let (pixels, side) = (ImageProcessor.maxPixels, ImageProcessor.maxSide)
        if width < 1 || height < 1 || max(width, height) > side || width * height > pixels {
            throw MobileMMError("a picture of \(width)×\(height) is more than the limit of \(pixels) pixels, \(side) a side")
        }
    }
}

#if canImport(ImageIO)
    extension PictureFile {
        /// The pixels of an encoded picture, turned as its camera noted.
        public static func decode(_ data: Data) throws -> PixelRaster {
            guard let source = CGImageSourceCreateWithData(data as CFData, nil),
                let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
            else { throw MobileMMError("is no picture that can be read") }
            let properties = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any]
            let orientation = (properties?[kCGImagePropertyOrientation] as? NSNumber)?.intValue ?? 1
            return try pixels(image).upright(orientation)
        }

        /// Writes a PNG file. Throws ``MobileMMError`` naming it when that cannot be.
        public static func write(_ picture: PixelRaster, to file: URL) throws {
            guard let image = image(picture),
                let target = CGImageDestinationCreateWithURL(file as CFURL, "public.png" as CFString, 1, nil)
            else { throw MobileMMError("\(file.path): cannot be written") }
            CGImageDestinationAddImage(target, image, nil)
            if !CGImageDestinationFinalize(target) { throw MobileMMError("\(file.path): cannot be written") }
        }

        /// As the screen takes it.
        public static func image(_ picture: PixelRaster) -> CGImage? {
            let data = picture.pixels.withUnsafeBytes { Data($0) }
            guard let provider = CGDataProvider(data: data as CFData) else { return nil }
            let layout = CGImageAlphaInfo.first.rawValue | CGBitmapInfo.byteOrder32Little.rawValue
            return CGImage(
                width: picture.width, height: picture.height, bitsPerComponent: 8, bitsPerPixel: 32,
                bytesPerRow: 4 * picture.width, space: CGColorSpace(name: CGColorSpace.sRGB)!,
                bitmapInfo: CGBitmapInfo(rawValue: layout), provider: provider, decode: nil, shouldInterpolate: true,
                intent: .defaultIntent)
        }

        /// The pixels of a picture in memory.
        public static func pixels(_ image: CGImage) throws -> PixelRaster {
            let (width, height) = (image.width, image.height)
            try checkSize(width, height)
            var bytes = [UInt8](repeating: 0, count: 4 * width * height)
            let drawn = bytes.withUnsafeMutableBytes { memory in
                guard
                    let context = CGContext(
                        data: memory.baseAddress, width: width, height: height, bitsPerComponent: 8,
                        bytesPerRow: 4 * width, space: CGColorSpace(name: CGColorSpace.sRGB)!,
                        bitmapInfo: CGImageAlphaInfo.premultipliedLast.rawValue)
                else { return false }
                context.draw(image, in: CGRect(x: 0, y: 0, width: width, height: height))
                return true
            }
            if !drawn { throw MobileMMError("no memory for a picture of \(width)×\(height)") }
            return PixelRaster(
                width: width, height: height,
                pixels: (0..<width * height).map { index in
                    let alpha = UInt32(bytes[4 * index + 3])
                    func straight(_ byte: UInt8) -> UInt32 {
                        alpha == 0 ? 0 : min((UInt32(byte) * 255 + alpha / 2) / alpha, 255)
                    }
                    let (red, green, blue) = (bytes[4 * index], bytes[4 * index + 1], bytes[4 * index + 2])
                    return alpha << 24 | straight(red) << 16 | straight(green) << 8 | straight(blue)
                })
        }
    }
#else
    extension PictureFile {
        /// The pixels of an encoded picture, turned as its camera noted.
        public static func decode(_ data: Data) throws -> PixelRaster {
            let bytes = [UInt8](data)
            if bytes.starts(with: [0x89, 0x50, 0x4E, 0x47]) { return try png(bytes) }
            if bytes.starts(with: [0xFF, 0xD8]) { return try jpeg(bytes).upright(Orientation.of(bytes)) }
            throw MobileMMError("is neither PNG nor JPEG, which is what can be read here")
        }

        private static func png(_ bytes: [UInt8]) throws -> PixelRaster {
            var image = png_image()
            image.version = UInt32(PNG_IMAGE_VERSION)
            defer { png_image_free(&image) }
            let size = bytes.count
            let begun = bytes.withUnsafeBytes { png_image_begin_read_from_memory(&image, $0.baseAddress, size) }
            if begun == 0 { throw MobileMMError("is a damaged PNG file") }
            let (width, height) = (Int(image.width), Int(image.height))
            try checkSize(width, height)
            // In memory blue, green, red, alpha: 0xAARRGGBB where the lowest byte comes first.
            image.format = UInt32(PNG_FORMAT_FLAG_COLOR | PNG_FORMAT_FLAG_ALPHA | PNG_FORMAT_FLAG_BGR)
            var pixels = [UInt32](repeating: 0, count: width * height)
            let done = bytes.withUnsafeBytes { _ in
                pixels.withUnsafeMutableBytes { png_image_finish_read(&image, nil, $0.baseAddress, 0, nil) }
            }
            if done == 0 { throw MobileMMError("is a damaged PNG file") }
            return PixelRaster(width: width, height: height, pixels: pixels.map(UInt32.init(littleEndian:)))
        }

        /// Writes a PNG file. Throws ``MobileMMError`` naming it when that cannot be.
        public static func write(_ picture: PixelRaster, to file: URL) throws {
            var image = png_image()
            image.version = UInt32(PNG_IMAGE_VERSION)
            (image.width, image.height) = (UInt32(picture.width), UInt32(picture.height))
            image.format = UInt32(PNG_FORMAT_FLAG_COLOR | PNG_FORMAT_FLAG_ALPHA | PNG_FORMAT_FLAG_BGR)
            let bytes = picture.pixels.map(\.littleEndian)
            if png_image_write_to_file(&image, file.path, 0, bytes, 0, nil) == 0 {
                throw MobileMMError("\(file.path): cannot be written")
            }
        }

        private static func jpeg(_ bytes: [UInt8]) throws -> PixelRaster {
            let handle = tjInitDecompress()
            defer { tjDestroy(handle) }
            var (width, height, subsampling, colorspace): (Int32, Int32, Int32, Int32) = (0, 0, 0, 0)
            let size = UInt(bytes.count)
            if tjDecompressHeader3(handle, bytes, size, &width, &height, &subsampling, &colorspace) != 0 {
                throw MobileMMError("is a damaged JPEG file")
            }
            try checkSize(Int(width), Int(height))
            var pixels = [UInt32](repeating: 0, count: Int(width) * Int(height))
            let format = Int32(TJPF_BGRA.rawValue)
            let failed = pixels.withUnsafeMutableBytes { memory in
                let target = memory.bindMemory(to: UInt8.self).baseAddress
                return tjDecompress2(handle, bytes, size, target, width, 0, height, format, 0) != 0
                    && tjGetErrorCode(handle) == TJERR_FATAL.rawValue
            }
            if failed { throw MobileMMError("is a damaged JPEG file") }
            return PixelRaster(
                width: Int(width), height: Int(height), pixels: pixels.map(UInt32.init(littleEndian:)))
        }
    }
#endif
